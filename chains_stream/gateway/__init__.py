"""HTTP in front of a Chain's entrypoint: any number of gateways, none of which holds state that another needs."""
