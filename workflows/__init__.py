"""The stages, one runnable file each, and the only place that imports Ray."""
