"""The dashboard: looks at run folders in a browser, and starts without torch."""

__all__ = ["create_app", "serve"]


def __getattr__(name: str) -> object:
    if name in __all__:
        from lens_dashboards import server

        return getattr(server, name)
    raise AttributeError(f"module 'lens_dashboards' has no attribute {name!r}")
