//! stub
use crate::api::*;
use crate::config::AgentConfig;
use crate::error::*;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

#[derive(Debug)]
pub struct Host {}
fn no<T>() -> Result<T> {
    Err(Failure::new(Kind::Failed, "not wired"))
}
impl Host {
    pub async fn start(
        _c: AgentConfig,
        _r: &Path,
        _p: &(dyn Fn(&str) + Sync),
    ) -> Result<Arc<Self>> {
        no()
    }
    pub async fn stop(&self, _t: Duration) {}
    pub async fn status(&self) -> Status {
        panic!()
    }
    pub fn cache_status(&self) -> CacheStatus {
        panic!()
    }
    pub async fn list(&self) -> Result<Vec<Vdi>> {
        no()
    }
    pub async fn info(&self, _: &str) -> Result<VdiInfo> {
        no()
    }
    pub async fn create(&self, _: &str, _: u64) -> Result<Created> {
        no()
    }
    pub async fn delete(&self, _: &str) -> Result<Done> {
        no()
    }
    pub async fn attach(&self, _: &str) -> Result<Attached> {
        no()
    }
    pub async fn detach(&self, _: &str, _: bool) -> Result<Done> {
        no()
    }
    pub async fn resize(&self, _: &str, _: u64) -> Result<Created> {
        no()
    }
    pub async fn drain(&self, _: Option<&str>) -> Result<Drained> {
        no()
    }
}
