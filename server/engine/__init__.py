"""The engine process: a busy loop that owns the device."""
