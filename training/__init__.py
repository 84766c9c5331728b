"""What the trainers are made of."""
