"""The load of the experts as numbers, as a picture, and in Trainer's logs."""
