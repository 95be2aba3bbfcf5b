"""How the teacher decodes, recorded: the Parquet contract, its shards and the stage that writes them."""
