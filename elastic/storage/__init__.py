"""Files on a local disk or on whatever `pyarrow.fs` knows: written whole or not at all."""
