//! vhost-user-blk server.
