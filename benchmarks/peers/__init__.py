"""The same training done by others. Each module runs as a process of its own and logs its steps with `kit.logs`."""
