"""Which heads are alike, and which keep their pattern."""
