"""The platform: machines, models, weights, metrics. Knows Ray; knows no app and no job."""
