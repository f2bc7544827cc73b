"""Making a dataset of tables: read and fit, then write shards, catalogue and index; a killed making goes on."""
