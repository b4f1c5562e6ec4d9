"""How a sidecar is found, started, owned and left: both the clients' and the supervisor's side."""
