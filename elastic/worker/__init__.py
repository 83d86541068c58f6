"""The process that trains: built once, it takes part in one generation after another."""
