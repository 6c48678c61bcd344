"""Pure functions of tables: statistics and figures. Nothing here imports torch."""
