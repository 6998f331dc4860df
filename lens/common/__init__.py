"""What every room needs and no user calls: errors, results, files, names of heads, colours, progress."""
