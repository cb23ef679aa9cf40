"""Dashboard, alert rules, Prometheus, Grafana: what shows the metrics of `cluster.metrics`."""
