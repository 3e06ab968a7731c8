"""What can be said of the parts: each check takes them as they are read, and says what it found."""
