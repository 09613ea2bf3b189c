"""The database backend for PostgreSQL; ``ENGINE`` names this package."""
