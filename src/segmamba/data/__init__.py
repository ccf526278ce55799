"""Data sets where they lie, and their way to the network and back."""
