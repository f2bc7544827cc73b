"""Tables as people have them: reading files, columns in the types of the schema, vocabularies, splits."""
