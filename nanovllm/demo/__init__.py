"""The demo: a broker, an object store, a worker and jobs on one machine, and a report."""
