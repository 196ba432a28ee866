//! `store repair`: writes what has one right answer, after asking.

use super::StoreArgs;
use super::looking::Looking;
use super::output::{Output, counted};
use super::store_commands::alone;
use crate::error::{Failure, Kind, Result};
use crate::host::store::{Access, open_device, open_read_only};
use crate::machine::{MACHINE_ID_FILE, host_name, this_machine};
use blockstore::{OpenOptions, Repairer, Store};
use gc::{Findings, Report};
use serde::Serialize;
use std::io::{BufRead, IsTerminal, Write};
use std::path::Path;

/// How to repair.
#[derive(Clone, Debug, clap::Args)]
pub struct RepairArgs {
    /// Do not ask
    #[arg(long)]
    yes: bool,
    /// Only say what would be done
    #[arg(long, conflicts_with = "yes")]
    dry_run: bool,
    /// Your word that no agent of any host uses the store, though its host table says so, or cannot be read
    #[arg(long)]
    no_host_runs: bool,
}

/// A problem that has no one right answer.
#[derive(Debug, Serialize)]
struct Left {
    problem: String,
    advice: String,
}

/// What was found, and what became of it.
#[derive(Debug, Serialize)]
struct Outcome {
    store: uuid::Uuid,
    url: String,
    repairs: Vec<String>,
    blocks_to_mark: u64,
    blocks_to_free: u64,
    not_freed_because: Option<&'static str>,
    left: Vec<Left>,
    repaired: bool,
    blocks_written: usize,
    /// What the check says now.
    check: Report,
}

impl Outcome {
    fn of(findings: &Findings) -> Self {
        let left = |(problem, advice): (&str, &str)| Left {
            problem: problem.into(),
            advice: advice.into(),
        };
        Self {
            store: findings.check.store,
            url: findings.check.url.clone(),
            repairs: findings.repairs.clone(),
            blocks_to_mark: findings.blocks_to_mark,
            blocks_to_free: findings.blocks_to_free,
            not_freed_because: findings.not_freed_because,
            left: findings.left().map(left).collect(),
            repaired: false,
            blocks_written: 0,
            check: findings.check.clone(),
        }
    }
}

/// Checks, asks, repairs, and checks again.
///
/// # Errors
/// [`Kind::ProblemsFound`] with an empty message if the store is not as it should be at the end; [`Kind::Conflict`] naming who
/// uses the store; [`Kind::Usage`] if there is nobody to ask; those of opening.
pub async fn run(store: &StoreArgs, args: &RepairArgs, out: Output) -> Result<()> {
    let asks = !args.yes && !args.dry_run;
    if asks && !std::io::stdin().is_terminal() {
        let words = "nobody can be asked whether to repair, as standard input is no terminal: give --yes, or --dry-run to only look";
        return Err(Failure::new(Kind::Usage, words));
    }
    let by = repairer(args)?;
    let access = if args.dry_run { Access::ReadOnly } else { alone(&store.url) };
    let device = match open_device(&store.url, &store.device, access, None).await {
        Ok(device) => device,
        Err(failure) => return Err(name_holder(store, failure).await),
    };
    // Nothing is allocated, and no disk attached.
    let opened = Store::open(device, OpenOptions::read_only()).await?;
    let looking = Looking::begin(out);
    let findings = gc::examine(&opened, &by, looking.progress()).await?;
    looking.end();
    let mut outcome = Outcome::of(&findings);
    let nothing_to_do = findings.repairs.is_empty();
    if nothing_to_do || args.dry_run {
        out.print(&outcome, found)?;
        return end(nothing_to_do && outcome.check.is_sound());
    }
    if asks {
        eprint!("{}", found(&outcome));
        if !confirmed(findings.repairs.len())? {
            if out.json {
                out.print(&outcome, found)?;
            }
            eprintln!("Nothing was changed.");
            return end(false);
        }
    }
    let looking = Looking::begin(out);
    let repaired = gc::repair(&opened, &by, &findings, looking.progress()).await?;
    looking.end();
    outcome.repaired = true;
    outcome.blocks_written = repaired.blocks_written;
    outcome.check = repaired.check;
    out.print(&outcome, |outcome| {
        let told = if asks { String::new() } else { found(outcome) };
        format!("{told}{}", done(outcome))
    })?;
    end(outcome.check.is_sound())
}

/// Of a device that is locked the store tells by whom, if it can be read.
async fn name_holder(store: &StoreArgs, failure: Failure) -> Failure {
    if failure.kind != Kind::Conflict {
        return failure;
    }
    match open_read_only(&store.url, &store.device).await {
        Ok(opened) => match opened.refuse_if_used(&Repairer::default()).await {
            Err(named) => Failure::from(named),
            Ok(()) => failure,
        },
        Err(_) => failure,
    }
}

/// The report has said it all.
fn end(sound: bool) -> Result<()> {
    if sound { Ok(()) } else { Err(Failure::new(Kind::ProblemsFound, "")) }
}

fn repairer(args: &RepairArgs) -> Result<Repairer> {
    let host_name = host_name();
    let machine = this_machine(Path::new(MACHINE_ID_FILE))?;
    // Machines cloned from one image have one id.
    let machine = machine.map_or_else(String::new, |machine| machine.id.to_string());
    let machine = format!("{machine} {host_name}");
    Ok(Repairer { host_name, machine, no_host_runs: args.no_host_runs })
}

fn confirmed(blocks: usize) -> Result<bool> {
    eprint!("Write these {blocks} blocks? [y/N] ");
    let mut answer = String::new();
    let read =
        std::io::stderr().flush().and_then(|()| std::io::stdin().lock().read_line(&mut answer));
    read.map_err(|error| {
        Failure::new(Kind::Failed, format!("cannot read the answer from standard input: {error}"))
    })?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

fn found(outcome: &Outcome) -> String {
    let mut text = format!("store {} on {}\n\n", outcome.store, outcome.url);
    if outcome.repairs.is_empty() {
        text.push_str("Nothing has to be, or can be, repaired.\n");
    } else {
        text.push_str("This has one right answer; repairing will\n");
        text.extend(outcome.repairs.iter().map(|what| format!("  {what}\n")));
    }
    if let Some(because) = outcome.not_freed_because {
        let leaked = outcome.check.blocks_leaked;
        let blocks = counted(leaked, "block");
        let are = if leaked == 1 { "is" } else { "are" };
        text.push_str(&format!(
            "{blocks} that nothing was found to reach {are} left alone: {because}.\n"
        ));
    }
    if !outcome.left.is_empty() {
        text.push_str("\nThis has no one right answer, and is left as it is:\n");
    }
    for left in &outcome.left {
        text.push_str(&format!("  PROBLEM: {}\n    {}.\n", left.problem, left.advice));
    }
    if outcome.check.problems_not_listed > 0 {
        let more = outcome.check.problems_not_listed;
        text.push_str(&format!("  and {} more, not listed\n", counted(more, "problem")));
    }
    text
}

fn done(outcome: &Outcome) -> String {
    let after = &outcome.check;
    let mut text = format!(
        "\nwrote {}; checked again: {}, {}, {}\n",
        counted(outcome.blocks_written as u64, "block"),
        counted(after.vdis, "disk"),
        counted(after.snapshots, "snapshot"),
        counted(after.nodes, "node")
    );
    match after.problems.len() as u64 + after.problems_not_listed {
        0 => text.push_str("no problems\n"),
        1 => text.push_str("1 problem is left, see above\n"),
        left => text.push_str(&format!("{left} problems are left, see above\n")),
    }
    text
}
