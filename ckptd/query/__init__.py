"""Questions about many rows at once. Reads the catalog, changes nothing."""
