"""A method, a scenario and a backbone of our own."""
