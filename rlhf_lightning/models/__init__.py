"""Models: loading, the policy and its critic, the scalar model (reward and critic), sharding and export."""
