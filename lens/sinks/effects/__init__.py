"""What a sink does: edits of it beside controls."""
