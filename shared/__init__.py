"""What server and sites must agree on: the job, the images, the tasks, the training loop and the exchanged weights."""

__version__ = "0.1.0"
