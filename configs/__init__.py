"""ml_collections configurations, one file per experiment."""
