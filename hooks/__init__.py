"""What any optimizer can wear: a hook changes the step of a hidden matrix, one hook a file."""
