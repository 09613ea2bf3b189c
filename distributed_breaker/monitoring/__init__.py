"""What is known of a fleet, in the shapes that people and their tools read."""
