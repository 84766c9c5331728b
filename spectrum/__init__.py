"""What lies in a spectrum folder, and what is measured on it."""
