"""A run of the store shown in other people's tools: MLflow, TensorBoard, Prometheus.

``points`` says what there is to show; one small module a tool writes it there. Nothing but what is in the store goes
to them: figures, settings, names of sites.
"""
