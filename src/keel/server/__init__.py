"""What keel offers over HTTP, and the limits that every such offer has."""
