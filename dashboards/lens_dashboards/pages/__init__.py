"""One module per page: each turns a selection into components."""
