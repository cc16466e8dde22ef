"""The machinery behind the API files; nothing in it is part of PopART."""
