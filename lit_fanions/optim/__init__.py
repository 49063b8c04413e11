"""The optimizer, and how a module's parameters, groups and schedules are made for it."""
