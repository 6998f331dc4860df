"""What each head does: roles, retrieval, patterns, streaming."""
