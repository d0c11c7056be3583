"""Files as people write them, read right or refused: tables and JSON of facts, YAML as a schema says."""
