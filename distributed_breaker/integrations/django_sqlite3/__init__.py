"""The database backend for SQLite; ``ENGINE`` names this package."""
