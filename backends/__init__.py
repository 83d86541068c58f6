"""One folder per framework, found by name at run time; each offers `backend.create(model, settings) -> Backend`."""
