"""The files of a spectrum folder, and measurements on them."""
