"""The protected clients: what a service calls its dependencies with.  They are thin, and do not
import each other."""
