"""What a run may be set to: the schema, presets, overrides, and the tables of what there is to choose from."""
