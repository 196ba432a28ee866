//! `vdi schedule`: a disk's snapshots by themselves.

use super::agent_commands::at;
use super::output::{Output, Table};
use super::snap::time_of;
use crate::api::schedule::{ScheduleRequest, ScheduleStatus};
use crate::control::client::Client;
use crate::error::Result;
use blockstore::Schedule;
use blockstore::schedule::interval;

/// Sets the schedule if one is given, and shows what holds.
pub async fn run(
    client: &Client,
    name: &str,
    schedule: Option<Schedule>,
    out: Output,
) -> Result<()> {
    let path = at(name, "/schedule")?;
    let status: ScheduleStatus = match schedule {
        Some(schedule) => {
            let request = ScheduleRequest { schedule: schedule.to_string() };
            client.post(&path, &request).await?
        }
        None => client.get(&path).await?,
    };
    out.print(&status, text)
}

fn text(status: &ScheduleStatus) -> String {
    let ScheduleStatus { name, .. } = status;
    let Some(schedule) = &status.schedule else {
        return format!("{name}: no schedule; what one took is kept until 'ballast snap delete'");
    };
    if !status.attached {
        return format!(
            "{name}: {schedule}\nit is not attached to this host: nothing is taken or deleted here"
        );
    }
    let time = |time: Option<u64>| time.map_or_else(|| "-".into(), time_of);
    let mut table = Table::new(&["EVERY", ">KEPT", ">OF", "LAST", "NEXT"]);
    if let Some(cadence) = &status.cadence {
        table.row([
            cadence.behind.clone(),
            cadence.kept.to_string(),
            cadence.keep.to_string(),
            time(cadence.last),
            format!("{} more in the log", cadence.in_log),
        ]);
    }
    for rule in &status.rules {
        table.row([
            interval(rule.every_ms),
            rule.kept.to_string(),
            rule.keep.to_string(),
            time(rule.last),
            time(rule.next),
        ]);
    }
    let mut text = format!("{name}: {schedule}\n{}", table.render());
    text.push_str(&format!("since attached: {} taken, {} deleted\n", status.taken, status.deleted));
    match status.surplus {
        None => text.push_str("the store was not asked yet which there are\n"),
        Some(0) => {}
        Some(surplus) => {
            let held = match status.held_by_clones {
                0 => String::new(),
                held => format!(", but for {held} that have clones"),
            };
            text.push_str(&format!("{surplus} that no rule keeps are to be deleted{held}\n"));
        }
    }
    if let Some(trouble) = &status.trouble {
        text.push_str(&format!("ATTENTION: {trouble}\n"));
    }
    text
}
