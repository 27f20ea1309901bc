"""The scoring of images on a cluster: a pipeline of tasks and actors."""
