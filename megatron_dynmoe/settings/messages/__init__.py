"""How commands talk: they read words, refuse what is wrong in one line, and end with a code."""
