"""Keys, authenticated encryption, signatures and manifests. Knows neither torch nor Lightning."""
