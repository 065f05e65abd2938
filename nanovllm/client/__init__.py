"""Client for services that produce jobs and read results. No torch."""
