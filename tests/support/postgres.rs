//! A PostgreSQL cluster of the test process's own.
