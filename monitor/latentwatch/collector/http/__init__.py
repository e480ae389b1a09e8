"""The collector over HTTP: metrics, JSON API, evidence, live page."""
