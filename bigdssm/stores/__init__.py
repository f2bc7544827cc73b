"""Vector stores: systems outside this package that hold published document vectors and answer queries."""
