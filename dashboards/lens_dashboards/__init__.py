"""The dashboard: looks at run folders in a browser, and starts without torch."""
