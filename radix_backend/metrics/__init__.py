"""What doors tell of their requests and their engine, under one set of names."""
